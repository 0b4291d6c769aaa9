#!/usr/bin/env bash
# Pack what a GPU machine without network lacks to run Moetron with the newer pair, megatron-core 0.19 and Transformer
# Engine 2.20. The machine must have torch.
#   bash tests/gpu/kit/make_kit.sh OUT
# OUT gets site.tar.xz and use_kit.sh, which is sourced in a checkout's root there. Needs PyPI, g++ and CUDA's headers, no GPU.
# PyPI has no binary of Transformer Engine's PyTorch part: it is compiled against the machine's version of torch.
# Of the library's kernels those for one architecture are kept.
# Variables: PYTHON and TORCH as on the machine, ARCHITECTURE of its GPU (90: H100, H200), MCORE, TE, CUDA_HOME.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="${1:?make_kit.sh: name a folder for the kit}"
python="${PYTHON:-python3.12}" torch="${TORCH:-2.11.0}" architecture="${ARCHITECTURE:-90}"
mcore="${MCORE:-0.19.2}" te="${TE:-2.20.2}"
export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}" NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS="${MAX_JOBS:-$(nproc)}"

mkdir -p "$out/build"
out="$(cd "$out" && pwd)"
cd "$out/build"
[ -x env/bin/python ] || "$python" -m venv env
export PATH="$PWD/env/bin:$PATH"
pip install --quiet "torch==$torch" setuptools wheel pybind11 ninja packaging numpy
CPATH="$(python -c 'import glob, sysconfig
print(":".join(glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/include")))')" # of cuDNN and NCCL
export CPATH
compgen -G "wheels/transformer_engine_torch-$te-*.whl" >/dev/null ||
  pip wheel --quiet --no-deps --no-build-isolation --wheel-dir wheels "transformer-engine-torch==$te"

rm -rf site
pip install --quiet --target site --no-deps wheels/transformer_engine_torch-"$te"-*.whl "transformer-engine==$te" \
  "transformer-engine-cu13==$te" "megatron-core==$mcore" einops nvdlfw-inspect onnxscript onnx onnx-ir ml-dtypes
pip install --quiet --target site pydantic protobuf orjson # with theirs; torch and NumPy are not among them
library=site/transformer_engine/wheel_lib/libtransformer_engine.so
python "$here/keep_architecture.py" "$library" "$architecture"
strip --strip-all "$library" site/transformer_engine/wheel_lib/libnccl_ep.so
tar -C site -c --exclude=__pycache__ . | xz -T0 >"$out/site.tar.xz"
cp "$here/use_kit.sh" "$out"
ls -l "$out/site.tar.xz"
