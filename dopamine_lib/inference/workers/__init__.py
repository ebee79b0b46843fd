"""Patient, provider and crypto-provider as processes that talk over TLS."""
