"""Private inference: a network evaluated between a patient and a service provider, with a crypto-provider's help.

Roles (section 5 of the paper)
    patient          holds the image; the only one who learns the answer
    provider         holds the network's weights
    crypto-provider  hands out correlated randomness; holds nothing (in the paper, a hospital)

What each learns
    patient          a score for each grade, under fresh noise of the provider's, or the grade alone, as the provider
                     chooses (``protocols.opening``); whether its image took some hidden value near the ring's end
                     (``protocols.room``); the public plan; before a normalised head also one number, the spread of its
                     own image's features, under noise as well
    provider         which patient asked, when, and how often
    crypto-provider  the public plan, which patient opened a session, when, and how many queries were prepared
    anyone watching  what TLS shows: addresses, times and sizes
The plan makes public the architecture, the size and normalisation of the input, and the scales of the layers. Hidden
layers' weights are equalised, so that their scales say next to nothing; where values are added, exponents tell to a
factor of two how their ranges compare; the last layer's scale tells its range to a factor of two.

Threat model. Curious: follows the protocol and works out what it can. Active: sends what it likes.
    patient, curious                 a copy of the model, from enough answers (chapter 6 counts them); no exact weight
    patient, active                  last-layer weights too: before a normalised head it may send another t than its
                                     image's, so large that the noise no longer covers them. And of any hidden value a
                                     bit a query: it may shift values by what it sends, and is told whether one of them
                                     came near the ring's end. Not defended
    several patients                 what one could who asked all their questions
    provider, curious or active      nothing of an image: all that a patient sends is uniform, whatever it receives. An
                                     active one gives wrong answers, from other weights for instance. Not defended
    crypto-provider, curious         nothing of image, weights or answer: nobody sends it any
    crypto-provider, active          the same; it can make answers wrong. Not defended
    crypto-provider and provider     every image, from the patients' seeds. Not defended
    crypto-provider and a patient    all weights, from the provider's seed. Not defended
    provider and a patient           nothing of another patient's image
    without a crypto-provider        patient and provider, curious: as above, unless they can break what ``offline``
                                     rests on; active, ahead of a query: bits of the other's secrets. Not defended
    a stranger                       no session: certificates are pinned
A picture unlike any that the scales were set on may take values out of the ring, which makes the answer wrong. The
patient is told where one came near its end, and which such pictures are not noticed says ``protocols.room``;
``network.plan.evaluate`` measures how much room is left.

What is opened between patient and provider is masked by uniform randomness used once (the proof is at the top of each
protocol's file). Shares, masks and seeds live in memory only.

    plan, weights = compile_model(net, 224, calibration)            network.compiler    provider
    CryptoProvider(plan)                                  network.crypto_provider       crypto-provider, one per session
    Patient(plan, seed, channel).infer(x)                           network.parties     patient
    Provider(plan, weights, seed, channel).serve()                  network.parties     provider
    Patient(plan, channel), Provider(plan, weights, channel)        offline.parties     the same without the third

To follow one query from image to logits, read ``Patient.infer`` in network.parties, ``Plan`` in network.plan, ``Layer``
in protocols.operation, and then the layers, each with its protocol, steps first: protocols.convolution,
protocols.comparison, protocols.relu, protocols.pooling, and for a ``head`` protocols.truncation and
protocols.normalised. beaver is for reading: no layer uses it. How a network of torch becomes a plan: network.graph (its
steps), network.gains (how large values may be), network.quantise (weights as integers), network.compiler.
``network.rehearsal`` runs all three parties in one process; ``workers`` has them as processes that talk over TLS.
"""
