"""Replace keys on the running cluster: pyinfra inventory.py rotate.py --data what=gossip|tokens|ca

No request is lost and no quorum. A run that was cut off is ended by the same command.
"""

from tasks import lock, preflight, rotation

preflight.check_hosts()
what = rotation.wanted()
rotation.begin(what)
preflight.stop_at_first_failure(name="Stop at the first failure")
lock.hold(name="Let no other run begin", what=f"rotate {what}")
rotation.STEPS[what]()
lock.give_back(name="Let the next run begin")
