"""The records of the analysis: frozen dataclasses with nodes and parameters by name.

- ``use``: a parameter's use, what is recorded of it, and the tap that does it.
- ``layout``: how a parameter is laid out as the matrix of a block.
- ``coupling``: dependencies between blocks and the forest of those that are coupled.
- ``curvature_graph``: blocks, pairs, moments, and the graph that holds them all.
- ``plain``: all of these as values that JSON holds.

``kfac_fx`` itself exports those that users meet.
"""
