"""Private inference: a network evaluated between a patient and a service provider, with a crypto-provider's help.

Roles (section 5 of the paper)
    patient          holds the image; the only one who learns the answer
    provider         holds the network's weights
    crypto-provider  hands out correlated randomness; holds nothing (in the paper, a hospital)

What each learns
    patient          the logits, in fixed point, whose last places carry the protocols' random roundings; the public
                     plan; before a normalised head also one number, the spread of its own image's features
    provider         which patient asked, when, and how often
    crypto-provider  the public plan, which patient opened a session, when, and how many queries were prepared
    anyone watching  what TLS shows: addresses, times and sizes
The plan makes public the architecture, the size and normalisation of the input, and the scales of the layers. Hidden
layers' weights are equalised, so that their scales say next to nothing; the last layer's tells its range to a factor of
two.

Threat model. All three follow the protocol and try to learn more from what they see (semi-honest), and the
crypto-provider colludes with nobody: with the patient's seed the provider reads the image, with the provider's seed the
patient reads the weights. Nothing here proves to the patient that the provider used the right weights, or that a
cheating party would be caught. The answers themselves tell of the weights: enough queries train a copy. Values inside a
secret image cannot be checked, so a picture unlike any that the scales were set on may overflow and give a wrong
answer; ``network.plan.evaluate`` measures how much room is left.

What is opened between patient and provider is masked by uniform randomness used once (the proof is at the top of each
protocol's file). Shares, masks and seeds live in memory only.

    plan, weights = compile_model(net, 224, calibration)            network.compiler    provider
    CryptoProvider(plan)                                            network.parties     crypto-provider, one per session
    Patient(plan, seed, channel).infer(x)                           network.parties     patient
    Provider(plan, weights, seed, channel).serve()                  network.parties     provider

To follow one query from image to logits, read ``Patient.infer`` in network.parties, ``Plan`` in network.plan, ``Layer``
in protocols.operation, and then the layers, each with its protocol, steps first: protocols.convolution,
protocols.comparison (ReLU), protocols.pooling, and for a ``head`` protocols.truncation and protocols.normalised. beaver
is for reading: no layer uses it. ``network.rehearsal`` runs all three parties in one process; ``workers`` has them as
processes that talk over TLS.
"""
