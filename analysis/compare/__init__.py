"""Self-FL (or any method) against every other one: paired differences, and where it loses.

    python -m analysis.compare --experiment NAME [--reference LABEL] [--output DIR] [--store URI]

A scene is one data set, dealt in one way, with one model and one participation rate. Within it a
reference is compared with each baseline on the same seeds, data and partitions; over all scenes
the differences of scene and seed are pooled.

``scenes``      which runs count, scenes, references and baselines
``bootstrap``   hierarchical bootstrap: seeds, then clients
``paired``      one comparison in numbers, Holm's correction, pooling
``verdict``     where a reference is ahead, level and behind, in words made from the numbers
``layout``, ``frames``, ``forest``   tables with footnotes; CSV; the figures

Reading MLflow, rows, intervals and bold are those of :mod:`analysis.report`.
"""
