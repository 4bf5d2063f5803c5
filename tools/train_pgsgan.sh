#!/bin/sh
# PGSgan on 2000 phantom ovaries at 128 px, for hours on a CPU; the same command goes on where it was stopped.
#   sh tools/train_pgsgan.sh [RUN]          in the background: nohup nice sh tools/train_pgsgan.sh > pgsgan.log 2>&1 &
set -e
out=${1:-runs/pgsgan}
if [ -f "$out/config.json" ]; then exec medsketch train --resume "$out"; fi
exec medsketch train pgsgan --data phantoms:ultrasound:2000 --out "$out" --scale "${MEDSKETCH_SCALE:-cpu}" --every 500
