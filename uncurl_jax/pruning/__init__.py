"""Router statistics -> plan -> merged experts: pure array functions, no Flax, no SeqIO, no Orbax.

statistics.py and calibration.py gather additive sums in one pass over the task; affinity.py,
clustering.py and methods.py group the experts; plan.py writes the decision down; alignment.py,
merging.py, router.py and prune.py carry it out on one layer's arrays.
"""
