#!/bin/sh
# Unpacks restic 0.18 of Debian trixie, one static program, beside the host's own restic: into restic-0.18 in
# VMFLEECE_TESTS_CACHE (/var/cache/vmfleece-tests). Nothing is installed, the host's packages and apt's state stay as
# they are. Does nothing where it is there already; only the default place needs root.
set -eu

cache=${VMFLEECE_TESTS_CACHE:-/var/cache/vmfleece-tests}
folder=$cache/restic-0.18
if [ -x "$folder/restic" ]; then
    exit 0
fi
mkdir -p "$cache"
work=$(mktemp -d "$cache/unpacking-restic-XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# The mirror that the host's own packages come from.
mirror=$(apt-get indextargets --no-release-info --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
    awk '$1 == "bookworm" || $1 == "trixie" { print $2; exit }')
if [ -z "$mirror" ]; then
    echo "restics.sh: no apt source for Debian bookworm or trixie found: add one, then run this again" >&2
    exit 1
fi
mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial" "$work/all"
: >"$work/status"
echo "deb $mirror trixie main" >"$work/sources.list"
for command in update 'install --download-only -y --no-install-recommends restic'; do
    # shellcheck disable=SC2086
    apt-get -qq -o Acquire::Retries=3 -o APT::Update::Error-Mode=any \
        -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null \
        -o Dir::State="$work/state" -o Dir::State::Status="$work/status" -o Dir::Cache="$work/cache" \
        -o APT::Sandbox::User="$(id -un)" -o Acquire::Languages=none $command >"$work/apt.log" 2>&1 || {
        cat "$work/apt.log" >&2
        exit 1
    }
done
dpkg -x "$work"/cache/archives/restic_*.deb "$work/all"
mkdir "$work/done"
mv "$work/all/usr/bin/restic" "$work/done/restic"
chmod 755 "$work/done"
"$work/done/restic" version >&2
# A rename puts it there whole, whoever else is at it.
mv -T "$work/done" "$folder" 2>/dev/null || [ -x "$folder/restic" ]
