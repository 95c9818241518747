"""Router statistics -> plan -> merged experts: pure array functions, no Flax, no SeqIO, no Orbax.

statistics.py, router_inputs.py and calibration.py gather sums and a sample in one pass over the
task; affinity.py, clustering.py, grouping.py, keep_methods.py, cluster_methods.py, methods.py and
budgets.py group the experts; router.py and router_fit.py say what routes to them; plan.py makes the
decision, plan_file.py and layer_plan.py write it down, diagnostics.py judges it; alignment.py,
assignment.py, merging.py and prune.py carry it out on one layer's arrays.
"""
