"""The head in fused Triton kernels: CUDA, or any device under `TRITON_INTERPRET=1`."""
