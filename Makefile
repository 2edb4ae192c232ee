# make train   the demo: environment, package, demo data, DISCOVR pretraining
# make test    the tests
# make model   the demonstration model: heads for EF and contours on the demo training
# make mlflow  MLflow's pages over all trainings and evaluations, on this machine only
# make docs    the documentation as a site: site/index.html (to search in it: python -m http.server -d site)
# make bundle  dist/discovr.zip and the wheel: all that another machine needs
# make label   the MONAI Label server: discovr-monai label (docs/annotation.md)
# make bench   the training step against its plain formulation (docs/performance.md)
#
# CPU build of PyTorch by default; for NVIDIA GPUs:  make train TORCH=cuda
PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3)
ifneq ($(shell command -v python3.11 >/dev/null 2>&1 && python3.11 -c '' 2>/dev/null && echo yes),)
PYTHON := python3.11
endif
TORCH ?= cpu
VENV := .venv
RUN := $(CURDIR)/$(VENV)/bin
PIP := $(RUN)/python -m pip --disable-pip-version-check
CONSTRAINTS := -c constraints.txt

# PyTorch publishes CPU builds for Linux on its own index only; PyPI's are for CUDA (several GB).
ifeq ($(TORCH),cpu)
ifeq ($(shell uname -s),Linux)
TORCH_SOURCE := --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
endif
endif
TORCH_SOURCE ?= torch==2.13.0

.PHONY: train test model mlflow docs bundle label bench lint environment test-environment clean

train: environment
	cd bundles/discovr && $(RUN)/python -m monai.bundle run training --config_file configs/train.yaml $(ARGS)

# Two processes, each with one file of tests at a time and one thread.
test: test-environment
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# models/model.pt from the demo training: video teacher and an EF head, image teacher and contours
RUN_BUNDLE := cd bundles/discovr && $(RUN)/python -m monai.bundle run
model: train
	$(RUN_BUNDLE) evaluating --config_file configs/lvef.yaml --save_head output/heads/ef.safetensors --view A4C
	$(RUN_BUNDLE) evaluating --config_file configs/segmentation.yaml --branch image_teacher --save_head output/heads/segmentation.safetensors --view A4C
	cd bundles/discovr && $(RUN)/discovr-monai model output/pretrain/last.pt models/model.pt \
	  --head output/heads/ef.safetensors --head output/heads/segmentation.safetensors

mlflow: environment
	cd bundles/discovr && $(RUN)/discovr-monai mlflow $(ARGS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet

bundle: environment
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	$(RUN)/python -c 'from discovr_monai.configuration import pack_bundle; pack_bundle("bundles/discovr", "dist/discovr.zip")'

label: $(VENV)/.label

bench: environment
	$(RUN)/python benchmarks/speed/train_step.py --out output/bench $(ARGS)

lint: test-environment
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

environment: $(VENV)/.$(TORCH)
test-environment: $(VENV)/.test $(VENV)/.label

# The package is installed in place (-e), so that its code and the bundle can be edited.
$(VENV)/.$(TORCH): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and f"Python 3.11 or 3.12 is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH_SOURCE)
	$(PIP) install --quiet $(CONSTRAINTS) --editable .
	! $(PIP) check | grep -v -e '^monailabel ' -e '^No broken requirements'
	touch $@

$(VENV)/.test: $(VENV)/.$(TORCH)
	$(PIP) install --quiet $(CONSTRAINTS) --editable '.[dev,tensorboard]'
	touch $@

$(VENV)/.docs: $(VENV)/.$(TORCH)
	$(PIP) install --quiet $(CONSTRAINTS) --editable '.[docs]'
	touch $@

# Without its own requirements: torchvision, sam2 and pydicom-seg are not needed, and pydicom-seg
# does not work with this pydicom. That is what "pip check" above says of it.
$(VENV)/.label: $(VENV)/.$(TORCH)
	$(PIP) install --quiet $(CONSTRAINTS) --editable '.[label]'
	$(PIP) install --quiet $(CONSTRAINTS) --no-deps monailabel
	touch $@

clean:
	rm -rf $(VENV)
