module pyinfra-hashistack/lab/go/consul-template

go 1.26.4

require github.com/hashicorp/consul-template v0.43.0
