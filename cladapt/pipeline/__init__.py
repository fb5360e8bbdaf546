"""Every command as a function of paths and settings that returns a plain dict.

`streams`: logs, blocks, semantic IDs. `bases`: base+tokens. `runs`: train and evaluate. `ship`: merge, export,
recommend. `about`: the machine and the methods. `demo`: all of it on the embedded stream.
"""
