"""The benchmark of the kernels against everyone else: ``python -m attnlab.kernels.bench``.

`problems` draws what is computed and knows its exact result and least cost, `peers` holds who computes it, `registry` brings
both together, `measure` takes time, error and memory, and `report` writes the record and the table.
"""
