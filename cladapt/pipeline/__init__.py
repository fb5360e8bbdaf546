"""Every command as a function of paths and settings that returns a plain dict.

`streams`: logs, blocks, semantic IDs. `bases`: base+tokens. `images`: streams and bases of classes. `runs`: train, plan
and resume, for every workload. `evaluation`, `compare`: what runs show. `ship`: merge, export, recommend. `about`: the
machine and the methods. `demo`: all of it on the embedded stream.
"""
