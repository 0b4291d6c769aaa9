# shellcheck shell=bash
# Source this in the root of a checkout, on the machine that make_kit.sh made the kit for.
kit="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
site="${TMPDIR:-/tmp}/moetron_gpu_site_$(cksum <"$kit/site.tar.xz" | cut -d' ' -f1)"
if [ ! -e "$site/ready" ]; then
  mkdir -p "$site"
  tar -C "$site" -xJf "$kit/site.tar.xz" && touch "$site/ready"
fi
export PYTHONPATH="$PWD:$site"
# Transformer Engine prefers the toolkit's cuDNN to torch's, of another version perhaps.
CUDNN_HOME="$(python3 -c 'import nvidia.cudnn as m; print(list(m.__path__)[0])' 2>/dev/null)"
if [ -n "$CUDNN_HOME" ]; then export CUDNN_HOME CUDNN_PATH="$CUDNN_HOME"; else unset CUDNN_HOME; fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
