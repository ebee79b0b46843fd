"""Who pays for privacy, and what helps.

who pays        scores (of subgroups, the worst group and the gap), utility (at several epsilons)
what helps      measures: group_sampling, adaptive_clipping and a balanced loss, each at the same epsilon; paired says
                who gains and who loses
another way     output_perturbation (the method), alternatives (the method on the kit's patients); private_generator
                (moments released once, and patients drawn from them)
pictures        figures
"""
