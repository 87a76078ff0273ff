#!/usr/bin/env bash
# K2_test on cpu:2x8: 2 host(s) with 8 device(s) each, 16 devices in all; mesh replica 2, fsdp 8
# plan: fits, 79.2 of 95.7 GiB a chip; stage1 10.500 s a step, MFU 67.9% causal; 43.0 days (estimated)
# code: commit cccccccccccccccccccccccccccccccccccccccc; sha256 2222222222222222222222222222222222222222222222222222222222222222; requirements.lock sha256 1111111111111111111111111111111111111111111111111111111111111111
# configuration: sha256 <config_digest> of the keys that decide what is computed (k2jax/run/drift.py)
# XLA, by the trainer: xla_backend_optimization_level=1
# exit codes: 75 restarts at once, 74 and a lost host after 60 s, at most 100 times in all; 65, 70, 78 and others stop
# Written by tools/launch.py, which runs nothing: read it, then run it.

NAME=k2-test
TOPOLOGY=cpu:2x8
HOSTS=2
HOSTS_PER_SLICE=2
IS_TPU=0
CODE=k2jax
PYTHON=.venv/bin/python
WORKDIR=/mnt/shared/run
EXTRA=''
LOCK_DIGEST=1111111111111111111111111111111111111111111111111111111111111111
PORT=8476
MAX_RESTARTS=100
DELAY_S=60
ARGUMENTS=(--config=experiments/k2.py --workdir=/mnt/shared/run)
EXPECTED=(--topology=cpu:2x8 --config-digest=<config_digest> --lock-digest=1111111111111111111111111111111111111111111111111111111111111111 --code-digest=2222222222222222222222222222222222222222222222222222222222222222)
export JAX_PLATFORMS=cpu
export XLA_FLAGS=--xla_force_host_platform_device_count=8

<templates/common.sh>

<templates/host.sh>
