#!/usr/bin/env bash
# Figure 1 on a rented GPU, as much of it as the time allows; call it again to go on.
#
#     bash dopamine_lib/reproduction/on_a_gpu.sh OUT [MINUTES] [more options of reproduce]
#
# All of SqueezeNet at 224 pixels, from ImageNet weights, on APTOS-2019. What tells most comes first: one run of FSCDP
# and one of C, then the other settings, then further runs. A table comes out, and figure1.png and results.json in OUT.
set -euo pipefail
out=$(realpath -m "${1:?give a folder for the results}")
case ${2:--} in # an option in the place of the minutes is one
-*) minutes=9 && shift ;;
*) minutes=$2 && shift 2 ;;
esac
resume=()
if [ -e "$out/options.json" ]; then resume=(--resume); fi
exec python -m dopamine_lib reproduce --data aptos --model squeezenet --size 224 --weights imagenet \
    --device cuda --minutes "$minutes" --out "$out" "${resume[@]}" "$@"
