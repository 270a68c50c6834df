"""RLHF versus DPO: the whole comparison as one reproducible pipeline."""
