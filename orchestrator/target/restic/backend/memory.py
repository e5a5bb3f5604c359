"""A place that is gone with the process: for tests, and the measure of the others."""

import threading
from collections.abc import Iterable

from orchestrator.target.restic.backend.base import Backend, Content, File, Kind, Stored
from orchestrator.target.restic.errors import FileExists, FileMissing


class MemoryBackend(Backend):
    """Several clients share one by being the same object."""

    place = "memory"

    def __init__(self) -> None:
        self.files: dict[File, bytes] = {}
        self._turn = threading.Lock()

    def create(self) -> None:
        pass

    def save(self, file: File, content: Content, *, replace: bool = True) -> None:
        with self._turn:
            if not replace and file in self.files:
                raise FileExists(f"{file} is there already")
            self.files[file] = bytes(content)

    def read(self, file: File, *, offset: int = 0, length: int | None = None) -> bytes:
        content = self.files.get(file)
        if content is None:
            raise FileMissing(f"there is no {file}")
        return content[offset : None if length is None else offset + length]

    def list(self, kind: Kind) -> Iterable[Stored]:
        with self._turn:
            return [Stored(file, len(content)) for file, content in self.files.items() if file.kind is kind]

    def remove(self, file: File) -> None:
        with self._turn:
            self.files.pop(file, None)

    def clean(self) -> int:
        return 0
