"""The parts of the network: trunk, experts, router and the loss. torch and transformers only,
nothing of ours."""
