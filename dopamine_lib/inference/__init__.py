"""Private inference: a network evaluated between a patient and a service provider, helped by a crypto-provider."""
