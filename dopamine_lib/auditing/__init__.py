"""Attacks on trained models, and what they prove about epsilon: lower bounds.

one patient     membership (was the model trained on it?), inversion (what does its update show?)
lower bounds    canaries (patients that give Algorithm 1 away), audit (what their scores prove)
under attack    shadow_models (targets, and the attacker's own models), planted_faults (what an audit must catch)
pictures        figure, explorer
"""
