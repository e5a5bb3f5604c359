# Everything here sets itself up: QEMUs and tools by apt (once, as root), Python packages into .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test soak lint bench tools host-tools install-service man clean
.DEFAULT_GOAL := test

tools: host-tools
	sh tests/guest/qemus.sh
	sh tests/peer/restics.sh

host-tools:
	PYTHON=$(PYTHON) sh tests/guest/install.sh

$(STAMP): pyproject.toml | host-tools
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[bench,dev]'
	touch $@

# A guest under load is backed up to a slow target, by hand and by the service, restored, and proven right.
demo: host-tools $(STAMP)
	$(BIN)/python -m benchmarks.demo

# Style, types, layers; then the tests, side by side; those on real QEMU with real guests two at a time.
test: tools lint
	$(BIN)/python -m pytest -n auto --dist worksteal tests/unit tests/component tests/peer tests/browser
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/faults tests/qemu

# 240 backups under load, on all QEMUs, since what kills a guest may do so once in tens (half an hour on two cores);
# then 260 kills of the daemon, with other faults between them (an hour). Reports are kept in .cache/faults.txt, too.
soak: tools $(STAMP)
	$(BIN)/python -m tests.soak.versions
	$(BIN)/python -m tests.faults --rounds 200 --target images --qemu 7.2
	$(BIN)/python -m tests.faults --rounds 60 --target repository --qemu 10.0

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Everything that is measured, one after the other (20 minutes), into benchmarks/RESULTS.md; best on a quiet machine.
bench: tools $(STAMP)
	$(BIN)/python -m benchmarks

# The unit, its group and folders (as root), for the command /usr/bin/vmfleece; then: systemctl enable --now vmfleece
install-service:
	@[ -n "$(DESTDIR)" ] || [ -x /usr/bin/vmfleece ] || { echo "no /usr/bin/vmfleece: first install it (README.md)" >&2; exit 1; }
	install -D -m 644 systemd/vmfleece.service $(DESTDIR)/etc/systemd/system/vmfleece.service
	install -D -m 644 systemd/vmfleece.sysusers.conf $(DESTDIR)/usr/lib/sysusers.d/vmfleece.conf
	install -D -m 644 systemd/vmfleece.tmpfiles.conf $(DESTDIR)/usr/lib/tmpfiles.d/vmfleece.conf
	[ -n "$(DESTDIR)" ] || systemd-sysusers vmfleece.conf
	[ -n "$(DESTDIR)" ] || systemd-tmpfiles --create vmfleece.conf

# Manual pages, from what --help and the configuration's schema are made from.
man: $(STAMP)
	$(BIN)/python -m orchestrator.cli.manual man

clean:
	rm -rf $(VENV) .cache
