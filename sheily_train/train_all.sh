#!/usr/bin/env bash
# Train every branch; further flags go to train_branch.py, as: sheily_train/train_all.sh --lora --epochs 3
exec python3 "$(dirname "${BASH_SOURCE[0]}")/train_branch.py" --all "$@"
