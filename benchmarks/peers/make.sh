#!/bin/sh
# Makes an environment for each of the frameworks that `python -m benchmarks --peers DIR` compares with.
#
#     benchmarks/peers/make.sh DIR [NAME…]        names: flower jax pfl byzfl fedlab fedjax; none: all
#
# PYTHON: the interpreter, 3.11 by default. TORCH: the requirement for torch, e.g. TORCH=torch==2.13.0+cpu where wheels
# without CUDA are at hand. What cannot be installed is named at the end; the others are usable.
set -u
if [ $# -lt 1 ]; then
    sed -n '2,8p' "$0"
    exit 2
fi
folder=$1
shift
PYTHON=${PYTHON:-python3.11}
TORCH=${TORCH:-torch==2.13.0}
[ $# -gt 0 ] || set -- flower jax pfl byzfl fedlab fedjax
missing=

install() {
    name=$1
    shift
    "$PYTHON" -m venv "$folder/$name" && "$folder/$name/bin/pip" install --quiet "$@"
}

mkdir -p "$folder"
for name in "$@"; do
    echo "$name"
    case $name in
        flower) install flower "$TORCH" "flwr[simulation]==1.41.0" ray==2.55.1 ;;
        jax) install jax jax==0.7.2 jaxlib==0.7.2 ;;
        pfl) install pfl "$TORCH" pfl==0.6.0 ;;
        # Their packages ask for torchvision, which nothing here needs: scripts put an empty one in its place.
        byzfl) install byzfl "$TORCH" numpy scipy && "$folder/byzfl/bin/pip" install --quiet --no-deps byzfl==0.0.11 ;;
        fedlab) install fedlab "$TORCH" numpy pandas scipy && "$folder/fedlab/bin/pip" install --quiet --no-deps fedlab==1.3.0 ;;
        fedjax) install fedjax fedjax==0.0.17 jax==0.7.2 jaxlib==0.7.2 ;;
        *) echo "no framework $name" >&2; exit 2 ;;
    esac || missing="$missing $name"
done
[ -z "$missing" ] || { echo "not installed:$missing" >&2; exit 1; }
