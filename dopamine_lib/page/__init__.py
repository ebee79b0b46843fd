"""Section 5.1: the patient's page, its server, and the two workers behind it."""
