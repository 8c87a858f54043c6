"""Names of contestants that reports look for."""

AUTO, TRITON, CUDNN, MATERIALISED = "fastrope-auto", "fastrope-triton", "cudnn", "materialised"
APPLIED = "-applied"  # appended: q and k arrive rotated
STOCK, STOCK_COMPILED = "diffusers", "diffusers-compiled"
