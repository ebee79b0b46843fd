"""Who pays for privacy, and what helps.

who pays        scores (of subgroups, the worst group and the gap), utility (at several epsilons)
what helps      measures: group_sampling, adaptive_clipping and balanced, each at the same epsilon
another way     output_perturbation (the method), alternatives (the method on the kit's patients)
pictures        figures
"""
