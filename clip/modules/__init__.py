"""The towers with places for memory slots, the memory learner and the classifier around them."""
