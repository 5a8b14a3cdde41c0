PYTHON ?= python3
.PHONY: demo check test test-slow

# The package index has CUDA builds of torch for Linux; they run on a CPU as well
.venv/demo: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

.venv/test: .venv/demo requirements-dev.txt
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch $@

demo: .venv/demo
	.venv/bin/python train_gpt2.py --model debug --data_dir sample_shards --out_dir demo --resume
	.venv/bin/python sample.py --checkpoint demo --prompt "Hello, I'm a language model,"

check: .venv/demo
	.venv/bin/python check.py

test: .venv/test
	.venv/bin/python -m pytest -q -n 2 -m "not slow"

test-slow: .venv/test
	.venv/bin/python -m pytest -q -m slow
