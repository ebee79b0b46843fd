"""Secure aggregation: BFV as a textbook and as training uses it, pairwise masks, and how updates become integers.

the textbook     encoding, ring, sampling, bfv: section 2.3 and Eqs. 4 to 6 in NumPy, for reading
under BFV        aggregation.BfvHospital.message encrypts, by group.Group.encrypt (TenSEAL); BfvServer.add adds
behind masks     masks has the protocol; mask_hospital and mask_server its two sides
in one process   bfv_sum, masks.MaskSum: all parties, and every message as bytes
for both         codec (floats to integers to slots), keys, messages, links (sealed and counted), transcript
"""
