# make demo: set up what is missing, then the tour.   make test: linters, types, layers, every test.
# make quick, make unit, make test: see CONTRIBUTING.md for which to run when.
PY := .venv/bin/python
STAMP := .venv/.installed
# Python and pytest keep compiled modules: the tests start thousands of processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo quick test test-no-layouts test-asan fuzz check unit bench bench-check bench-accept fidelity protocol man docs recording apps dist posix fstests ltp soak clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard src/daxemu/host/*/*.[ch]) .ci/system-packages
	bash .ci/system-packages
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: setup
	.venv/bin/daxemu demo

check: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	$(PY) -m tools.check_language

# The core alone (mm, pmem, fs, ranges), without a mount: under 60 s on two processors.
quick: setup
	$(PY) -m pytest tests/mm tests/pmem tests/fs tests/test_ranges.py -n auto

# Every test that mounts nothing, builds no package and starts no cluster.
unit: setup
	$(PY) -m pytest -m "not mount and not slow" -n auto --dist loadfile -rsfE --durations=10

# A file of tests for each processor at a time, in the order of tests/conftest.py: the longest first. Prints why tests were
# skipped, and the ten slowest.
test: check
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder -rsfE --durations=10

# The tests on mounts once more, with every request answered in Python.
test-no-layouts: setup
	DAXEMU_LAYOUTS=0 $(PY) -m pytest tests/mount -n auto --dist loadfile

# The C parts with AddressSanitizer and UBSan, from a build tree of their own; TESTS="files" for some tests only.
test-asan: setup
	PY=$(PY) bash tests/asan.sh $(or $(TESTS),tests/host tests/mount tests/fuzz)

# Every parser for so many seconds, two at a time: those in Python with coverage feedback (atheris), that of FUSE requests
# (host/fuse/answers.c) under AddressSanitizer. What breaks one is left in build/fuzz/crash-*.
SECONDS ?= 60
fuzz: setup
	mkdir -p build/fuzz
	printf '%s\n' control plan device_toml poison inode_row table_row sealed_page superblock answers | \
		PY=$(PY) xargs -P 2 -I TARGET bash tests/fuzz/run.sh TARGET $(SECONDS)

# Prints the figures with their ratios and which targets are missed, and what is worse than tests/bench/figures.json.
bench: setup
	rm -f tests/bench/latest.json
	$(PY) -m pytest tests/bench --run-bench -s
	$(PY) -m tests.bench.report show

# The same, and fails if anything is worse.
bench-check: bench
	$(PY) -m tests.bench.report check >/dev/null

# Makes the last figures the committed ones: figures.json and docs/performance-table.md.
bench-accept: setup
	$(PY) -m tests.bench.report accept

# The table of docs/fidelity-table.md, from the recordings; fails while anything in it is unexplained.
fidelity: setup
	$(PY) -m tests.conformance.fidelity > docs/fidelity-table.md

# The union of all events for type checkers, docs/protocol.md from the message types, docs/reference/cli.md from the help.
protocol: setup
	mkdir -p build
	$(PY) -m tools.event_types > build/any_event.py
	mv build/any_event.py src/daxemu/events/any_event.py
	$(PY) -m tools.protocol_docs > docs/protocol.md
	$(PY) -m tools.cli_docs markdown > docs/reference/cli.md
	$(PY) -c "from daxemu.host.fuse import opcodes; print(opcodes.table(), end='')" > docs/fuse-requests.md

man: setup
	mkdir -p build
	$(PY) -m tools.cli_docs man > build/daxemu.1

docs: setup
	.venv/bin/mkdocs build --strict --quiet

# docs/demo.svg, from a real run.
recording: setup
	$(PY) -m tools.record_demo

# docs/applications.md, from a real run of every program that is here, in both modes: about an hour.
apps: setup
	.venv/bin/daxemu apps --both -o docs/applications.md

dist: setup
	$(PY) -m build --outdir build/dist .

# A built copy of pjdfstest: make posix PJDFSTEST=DIR. Needs root and prove (perl).
posix: setup
	bash tests/posix.sh "$(PJDFSTEST)"

# A built copy of fstests: make fstests XFSTESTS=DIR runs xfs/550, 551, 552; with TESTS="-g quick", its check. Needs root.
fstests: setup
	bash tests/fstests.sh "$(XFSTESTS)" $(TESTS)

# A built copy of LTP: make ltp LTP=DIR [TESTS="fallocate01 ..."]. On a kernel with CONFIG_MEMORY_FAILURE it poisons real
# memory: LTP's poison is not in files. Needs root.
ltp: setup
	bash tests/ltp.sh "$(LTP)" $(TESTS)

# Thousands of crashes and races, an hour of mixed work in each mode: what CI has no time for.
soak: setup
	DAXEMU_CORRUPTION_IMAGES=100000 $(PY) -m pytest tests/corruption -n auto
	DAXEMU_CRASH_ROUNDS=5000 $(PY) -m pytest tests/mount/test_crash_loop.py --timeout 7200
	DAXEMU_RACE_SECONDS=600 $(PY) -m pytest tests/mount/test_races.py -s
	DAXEMU_RACE_SECONDS=600 $(PY) -m pytest tests/mount/direct/test_races.py -s
	DAXEMU_STRESS=7 $(PY) -m pytest tests/mount/direct/test_stress.py
	DAXEMU_SOAK=3600 $(PY) -m pytest tests/mount/test_soak.py tests/mount/direct/test_soak.py -s
	DAXEMU_MODEL_RANDOM=1 DAXEMU_MODEL_EXAMPLES=500 $(PY) -m pytest tests/fs tests/host/direct/test_model.py tests/repair/test_model.py \
		tests/mount/test_model.py --timeout 7200

clean:
	rm -rf .venv build src/*.egg-info
	find src -name '*.so' -delete
