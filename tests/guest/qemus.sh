#!/bin/sh
# Installs the oldest and the newest QEMU that the tests run with, beside the host's own: 7.2 from bookworm and 11.1
# from trixie-backports. Each is unpacked, with the libraries of its own release, into a folder of its own and runs
# through their loader: nothing of it is installed, the host's packages and apt's state stay as they are.
# The folders are qemu-7.2 and qemu-11.1 in VMFLEECE_TESTS_CACHE (/var/cache/vmfleece-tests), each with a command
# qemu-system-x86_64. Does nothing where they are there already: remove one to have it made again.
# Only the default place needs root; apt's sources must have Debian 12 or later.
set -eu

cache=${VMFLEECE_TESTS_CACHE:-/var/cache/vmfleece-tests}
work=""

say() {
    echo "qemus.sh: $*" >&2
}

give_up() {
    say "$*"
    exit 1
}

# The mirror that the host's own packages come from, whether or not apt has fetched its lists yet.
find_mirror() {
    apt-get indextargets --no-release-info --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
        awk '$1 == "bookworm" || $1 == "trixie" { print $2; exit }'
}

# Runs apt-get on the sources and the state in $work instead of the host's. As far as that apt knows nothing is
# installed, so it fetches every library.
private_apt() {
    apt-get -qq -o Acquire::Retries=3 -o APT::Update::Error-Mode=any \
        -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null \
        -o Dir::State="$work/state" -o Dir::State::Status="$work/status" -o Dir::Cache="$work/cache" \
        -o APT::Architecture=amd64 -o APT::Sandbox::User="$(id -un)" -o Acquire::Languages=none \
        "$@" >"$work/apt.log" 2>&1 || {
        cat "$work/apt.log" >&2
        give_up "apt-get $1 failed on $(tr '\n' ';' <"$work/sources.list")"
    }
}

# install_qemu VERSION RELEASE...: the newest QEMU of the last release, which the others complete.
install_qemu() {
    version=$1
    folder=$cache/qemu-$version
    shift
    if [ -x "$folder/qemu-system-x86_64" ]; then
        return
    fi
    say "unpacking QEMU $version into $folder"
    mkdir -p "$cache" 2>/dev/null && [ -w "$cache" ] ||
        give_up "cannot write to $cache: run this as root, or set VMFLEECE_TESTS_CACHE to a folder of yours"
    mirror=$(find_mirror)
    [ -n "$mirror" ] || give_up "no apt source for Debian bookworm or trixie found: add one, then run this again"

    # What a run left that was killed.
    find "$cache" -maxdepth 1 -name 'unpacking-*' -mmin +1440 -exec rm -rf {} +

    # Beside its final place, so that a rename puts it there whole, whoever else is at it.
    work=$(mktemp -d "$cache/unpacking-$version-XXXXXX")
    mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial" "$work/all"
    : >"$work/status"
    for release; do
        echo "deb $mirror $release main"
    done >"$work/sources.list"
    private_apt update
    private_apt install --download-only -y --no-install-recommends -t "$release" qemu-system-x86
    for package in "$work"/cache/archives/*.deb; do
        dpkg -x "$package" "$work/all"
    done

    mkdir -p "$work/done/usr/bin" "$work/done/usr/lib" "$work/done/usr/share"
    mv "$work/all/usr/bin/qemu-system-x86_64" "$work/done/usr/bin"
    mv "$work/all/usr/share/qemu" "$work/all/usr/share/seabios" "$work/done/usr/share"
    # Before trixie libraries are in /lib and /usr/lib both.
    for libraries in "$work"/all/lib/x86_64-linux-gnu "$work"/all/usr/lib/x86_64-linux-gnu; do
        if [ -d "$libraries" ]; then
            rm -rf "$libraries/gconv" "$libraries/security"
            cp -a "$libraries/." "$work/done/usr/lib"
        fi
    done
    cat >"$work/done/qemu-system-x86_64" <<'WRAPPER'
#!/bin/sh
# By absolute paths, since a loader finds neither modules nor firmware by the place of the program.
here=$(dirname "$(readlink -f "$0")")
QEMU_MODULE_DIR=$here/usr/lib/qemu
export QEMU_MODULE_DIR
exec "$here/usr/lib/ld-linux-x86-64.so.2" --library-path "$here/usr/lib" "$here/usr/bin/qemu-system-x86_64" \
    -L "$here/usr/share/qemu" -L "$here/usr/share/seabios" "$@"
WRAPPER
    chmod 755 "$work/done" "$work/done/qemu-system-x86_64"
    "$work/done/qemu-system-x86_64" --version >"$work/version" || give_up "the unpacked QEMU $version does not run"
    mv -T "$work/done" "$folder" 2>/dev/null || [ -x "$folder/qemu-system-x86_64" ] ||
        give_up "cannot put QEMU $version at $folder: remove what is there, then run this again"
    say "$(head -n 1 "$work/version") is ready"
    rm -rf "$work"
    work=""
}

trap '[ -z "$work" ] || rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
install_qemu 7.2 bookworm
install_qemu 11.1 trixie trixie-backports
