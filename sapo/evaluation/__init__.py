"""How well a policy ranks, and what its gradients and softmax say."""
