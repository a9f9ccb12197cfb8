#!/bin/bash
# Check Perdure on a CUDA device: bash benchmarks/gpu.sh [SECTION ...] [--cpu]. See benchmarks/gpu.py.
cd "$(dirname "$0")/.." || exit 2
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
