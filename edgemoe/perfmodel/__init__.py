"""What a machine can run: memory fits now, rates later."""
