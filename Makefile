PYTHON ?= python3
DEVICE ?= auto
.PHONY: demo check test test-slow
unexport PYTHONPATH PYTHONHOME

# The package index has CUDA builds of torch for Linux; they run on a CPU as well
.venv/demo: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15) and "Python 3.10 to 3.14 is needed: set PYTHON=")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -r requirements.txt
	touch $@

.venv/test: .venv/demo requirements-dev.txt
	.venv/bin/pip install -r requirements-dev.txt
	touch $@

# On a GPU that torch cannot use: make demo DEVICE=cpu
demo: .venv/demo
	.venv/bin/python train_gpt2.py --model debug --data_dir sample_shards --out_dir demo --resume --device $(DEVICE)
	.venv/bin/python sample.py --checkpoint demo --prompt "Hello, I'm a language model," --device $(DEVICE)

check: .venv/demo
	.venv/bin/python check.py --device $(DEVICE)

test: .venv/test
	.venv/bin/python -m pytest -q -n 2 -m "not slow"

test-slow: .venv/test
	.venv/bin/python -m pytest -q -m slow
