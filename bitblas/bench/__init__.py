"""What `python -m bitblas bench` runs; `import bitblas` imports nothing of it.

cases.py     which products: formats, operands, the float64 answer
timing.py    cold medians: CUDA graphs, or a clock
kernels.py   the read kernel and the chain's elementwise kernel (GPU)
peers.py     other libraries' products of the same weight
measure.py   all kernels of one case side by side, case after case
chain.py     the products of a whole model's layers, one after the other
report.py    CSV, table, Markdown page;  plot.py: roofline, time against m
"""
