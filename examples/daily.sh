#!/usr/bin/env bash
# Every day new data: a first run, then an extension for each day. About a minute, in folders that
# it makes here, and that must not be there: history, incoming, living.
set -euo pipefail

python "$(dirname "$0")/make_days.py" history incoming

# The days so far. A model and settings for images of 8 x 8 pixels; for photographs leave them out.
ritornello run arrivals --data history --output living \
    --model mlp --image-size 8 --crop-size 8 --augmentation none --workers 0 \
    --epochs 12 --batch-size 16 --learning-rate 0.05 \
    --capacity 200 --representatives 16

# Each day that comes, on as many ranks as are free. With --resume the same line can be run again.
for day in incoming/*; do
    ritornello extend living --data "$day" --ranks "${RANKS:-2}" --resume
done

ritornello inspect living
