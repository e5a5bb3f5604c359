"""What goes wrong with a repository.

All of it is a TargetError; a caller branches on the class or on `code`.

TargetError
├── Damaged            a file is not what its name, its seal or the format says
├── OtherVersion       it is in a version of the format that is not written here
├── WrongPassword      no key opens with the password                          exit 12
├── NoRepository       there is none at that place                             exit 10
├── RepositoryLocked   somebody else works on it alone                         exit 11
├── LockLost           our own lock is gone or too old: nothing may be written
└── BackendError       the place itself refused, and why is its code
    ├── FileMissing    there is no such file
    ├── FileExists     there is such a file already
    └── Unreachable    the place did not answer, or not in time
"""

from orchestrator.errors import EXIT_LOCKED, TargetError

EXIT_NO_REPOSITORY = 10
EXIT_WRONG_PASSWORD = 12


class Damaged(TargetError):
    """A file of the repository is damaged. `file` is its name there, `problem` what is wrong with it."""

    code = "repository-damaged"

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(
            f"{file} of the repository is damaged: {problem}",
            hint="`restic check --read-data` says what else is; `restic repair` helps where restic has it",
        )
        self.file = file
        self.problem = problem


class OtherVersion(TargetError):
    """The repository is in a version of restic's format that is not written here."""

    code = "repository-version"

    def __init__(self, version: int, ours: int) -> None:
        hint = "use a vmfleece that writes that version"
        if version < ours:
            hint = "`restic migrate upgrade_repo_v2` makes it version 2, while nobody else works on it"
        super().__init__(
            f"the repository is in version {version} of restic's format, and vmfleece works with version {ours}",
            hint=hint,
        )


class WrongPassword(TargetError):
    """No key of the repository opens with the password."""

    code = "wrong-password"
    exit_code = EXIT_WRONG_PASSWORD


class NoRepository(TargetError):
    """There is no repository at that place."""

    code = "no-repository"
    exit_code = EXIT_NO_REPOSITORY


class RepositoryLocked(TargetError):
    """Somebody else holds a lock beside which ours must not be."""

    code = "repository-locked"
    exit_code = EXIT_LOCKED


class LockLost(TargetError):
    """Our lock does not protect us any more; what was not yet committed must not be."""

    code = "lock-lost"


class BackendError(TargetError):
    """The place where the repository lies refused something. Codes: "target-full", "target-unwritable"."""

    code = "target-unwritable"


class FileMissing(BackendError):
    """There is no such file."""

    code = "file-missing"


class FileExists(BackendError):
    """There is such a file already, and it is not to be replaced."""

    code = "file-exists"


class Unreachable(BackendError):
    """The place did not answer, or not in time; whether it did what was asked is unknown."""

    code = "target-unreachable"
