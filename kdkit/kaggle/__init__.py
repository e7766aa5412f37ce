"""Putting the notebooks on Kaggle, from one table: `kaggle/kernels.yaml` of a checkout.

`table` reads it, `kernels` renders what the client reads, `push` runs the client and believes only the server's answer,
`wheelhouse` builds the wheels for sessions without internet, `commands` is `kdkit kaggle`. Imports are absolute, so
that `kaggle` is always the client.
"""
