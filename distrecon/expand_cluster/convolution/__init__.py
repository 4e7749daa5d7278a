"""Expand-and-Cluster for convolutional black boxes (docs/recovery.md, "Convolutional networks").

- hypothesis          what a black box is taken to be, as text
- network, files      networks of a hypothesis: features, Jacobians, torch modules; on disk
- projection          their fit, the readout eliminated
- filters, kinks      the first layer's filters from far out; layers of relu networks from where they bend
- rows                kinks as the weights of units
- residual, units     what the units known so far of the last layer of a relu network leave of the answers
- search              that layer completed from what is left
- students            wider networks, and the clusters of their channels
- channels, exact     channels dropped; one exact network
- weakness            what the answers do not determine
- recovery            all of it, round by round
"""
