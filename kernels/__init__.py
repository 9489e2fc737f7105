"""Triton kernels, installed as `fastpg.kernels`: kernel bodies and their launchers, nothing else."""
