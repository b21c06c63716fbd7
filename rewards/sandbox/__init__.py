"""Programs that nobody has read: run apart from everything, and judged from outside.

``runner.run_program`` runs one, ``grading.run_test`` puts one to a test. ``backends`` are the ways to shut a
program in, ``probe`` shows that one holds, ``choice`` takes the first that does, ``session`` is one sandbox from start
to end. ``keeper``, ``program``, ``judge``, ``kernel`` and ``values`` are what runs on the
inside: they import nothing but the standard library and each other, and little of it, because every program pays.
"""
