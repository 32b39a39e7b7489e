"""Tables, plots and one self-contained page from the runs of an MLflow experiment.

    python -m analysis.report --experiment NAME [--output DIR] [--store URI]

How a run becomes a number, in the order in which it happens:

``store``       reads MLflow: runs, metric series, ``clients.parquet``; writes nothing
``selection``   which runs count: one sweep, or all runs without parent; finished ones only
``grouping``    sections (one data set, one stage, one deal of the data) and rows (one method each)
``naming``      labels of rows: the fewest options that tell one method's rows apart
``numbers``     the final and the selected round of a run, and what it cost
``clients``     accuracy by client, and clients harmed against other rows
``statistics``  intervals over seeds, paired differences, what "within the interval" means
``summary``     all of the above for one section, and what it says in words (``answer``)
``layout``, ``notes``, ``tables``, ``frames``   tables with their footnotes; Markdown, LaTeX, CSV
``figures``, ``plots``, ``bars``, ``html``      figures and ``report.html``

Two runs are compared only if seed, data digest and partition digest agree (:class:`~analysis.
report.grouping.PairKey`). A metric that was not measured is ``n/a`` with a reason, never 0.
"""
