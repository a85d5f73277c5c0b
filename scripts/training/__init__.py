"""What scripts/train_default.py is made of. Needs torch, tokenizers and safetensors."""
