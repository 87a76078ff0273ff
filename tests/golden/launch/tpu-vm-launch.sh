#!/usr/bin/env bash
# K2_test on v5p:2x2x2*2: 2 slices of 2 host(s) with 4 device(s) each, 16 devices in all; mesh replica 2, fsdp 8
# plan: fits, 79.2 of 95.7 GiB a chip; stage1 10.500 s a step, MFU 67.9% causal; 43.0 days (estimated)
# code: commit cccccccccccccccccccccccccccccccccccccccc; sha256 2222222222222222222222222222222222222222222222222222222222222222; requirements.lock sha256 1111111111111111111111111111111111111111111111111111111111111111
# configuration: sha256 <config_digest> of the keys that decide what is computed (k2jax/run/drift.py)
# XLA, by the trainer: xla_enable_async_all_gather=true xla_enable_async_collective_permute=true xla_tpu_enable_async_collective_fusion=true xla_tpu_enable_async_collective_fusion_fuse_all_gather=true xla_tpu_enable_async_collective_fusion_multiple_steps=true xla_tpu_overlap_compute_collective_tc=true xla_tpu_decompose_einsum_reduce_scatter=true xla_tpu_enable_ag_backward_pipelining=true xla_tpu_scoped_vmem_limit_kib=65536 xla_of_tpus=true
# exit codes: 75 restarts at once, 74 and a lost host after 60 s, at most 100 times in all; 65, 70, 78 and others stop
# Written by tools/launch.py, which runs nothing: read it, then run it.

NAME=k2-test
TOPOLOGY='v5p:2x2x2*2'
HOSTS=4
HOSTS_PER_SLICE=2
IS_TPU=1
CODE=''
PYTHON=.venv/bin/python
WORKDIR=/mnt/shared/run
EXTRA='[tpu]'
LOCK_DIGEST=1111111111111111111111111111111111111111111111111111111111111111
PORT=8476
MAX_RESTARTS=100
DELAY_S=60
ARGUMENTS=(--config=experiments/k2.py --workdir=/mnt/shared/run)
EXPECTED=('--topology=v5p:2x2x2*2' --config-digest=<config_digest> --lock-digest=1111111111111111111111111111111111111111111111111111111111111111 --code-digest=2222222222222222222222222222222222222222222222222222222222222222)
COMMIT=cccccccccccccccccccccccccccccccccccccccc
NODES=(k2-test-0 k2-test-1)
ACCELERATOR=(--accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5 --node-count=2 --node-prefix=k2-test)

<templates/common.sh>

<templates/tpu_vm.sh>
