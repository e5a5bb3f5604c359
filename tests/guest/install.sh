#!/bin/sh
# Installs what the tests, the demo and the benchmarks need: QEMU 10 from bookworm-backports, nbdcopy,
# a C compiler for the guest's writer, file systems for storages to be tested on, restic to compare with, nbdkit
# for disks that fail, systemd to check the unit with, promtool for the alert rules, shells to complete in, mandoc, jq and curl,
# Chromium for the status page,
# and what Debian's Python lacks to make a virtual environment.
# Does nothing (and needs no root) where all of it is there already.
set -eu

PATH=$PATH:/usr/sbin:/sbin # mkfs is there, which not every user's PATH has
missing=""
for tool in qemu-system-x86_64 qemu-img qemu-nbd nbdcopy gcc cpio mkfs.ext4 mkfs.xfs mkfs.btrfs restic fusermount3 nbdkit systemd-analyze \
    zsh fish mandoc jq curl promtool chromium; do
    command -v "$tool" >/dev/null 2>&1 || missing="$missing $tool"
done
"${PYTHON:-python3.11}" -c "import ensurepip" 2>/dev/null || missing="$missing python3.11-venv"
if [ -z "$missing" ]; then
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "install.sh: missing:$missing. Run it once as root, on Debian 12: sudo sh $0" >&2
    exit 1
fi

echo "install.sh: missing:$missing; installing them with apt" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
if ! apt-get indextargets --format '$(RELEASE)' | grep -qx bookworm-backports; then
    # Backports come from the mirror that bookworm itself comes from.
    mirror=$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
        awk '$1 == "bookworm" { print $2; exit }')
    if [ -z "$mirror" ]; then
        echo "install.sh: no apt source for Debian bookworm found; add one, then run this again" >&2
        exit 1
    fi
    echo "deb $mirror bookworm-backports main" >/etc/apt/sources.list.d/vmfleece-backports.list
    apt-get update -qq
fi
apt-get install -y -qq --no-install-recommends -t bookworm-backports \
    qemu-system-x86 qemu-utils seabios ipxe-qemu >/dev/null
apt-get install -y -qq --no-install-recommends \
    libnbd-bin gcc libc6-dev cpio e2fsprogs xfsprogs btrfs-progs restic fuse3 nbdkit systemd \
    zsh fish mandoc jq curl chromium >/dev/null
case "$missing" in
*promtool*) # without Debian's prometheus, which would start to serve
    unpacked=$(mktemp -d)
    (cd "$unpacked" && apt-get download -qq prometheus 2>/dev/null && dpkg -x prometheus_*.deb .)
    install -m 755 "$unpacked/usr/bin/promtool" /usr/local/bin/promtool
    rm -r "$unpacked"
    ;;
esac
case "$missing" in
*python3.11-venv*) apt-get install -y -qq --no-install-recommends python3.11 python3.11-venv >/dev/null ;;
esac
