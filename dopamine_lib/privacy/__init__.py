"""Differential privacy: definitions, the Gaussian mechanism, accounting, the DP-SGD step and its randomness.

chapters 1 and 2    definitions, loss, checker; gaussian, composition
what a run spends   accounting: epsilon of events, sigma for an epsilon (noise_multiplier_for), the ledger
the private step    dpsgd.Task (bookkeeping, layers, linear_map); of the model "head" head.HeadTask (head_loop)
a balanced loss     balanced: class counts are released once, and classes count alike
views               augmentation: a patient's gradient is the mean over several views of the image
thresholds          operating_point: the last rounds ask for histograms of severities in place of gradients
the noise           rounded_gaussian, by normal; or discrete: integer_noise, by skellam; drawn from randomness
"""
