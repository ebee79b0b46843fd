"""The protocols between patient and provider, one a file, steps first; the crypto-provider deals for each."""
