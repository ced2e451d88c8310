// A recorded step: its calls one after the other, without a way back to Python between them.
#include "kernels.h"

// In the order of KERNELS in capture.py.
enum kernel { LINEAR, COPY_ENDS, ADD_RMS_NORM, GATED_SILU, ROTATE_AND_STORE, ROTATE_AND_STORE_LATENT, ROUTE, EXPERTS, ATTEND_PAGED };

// Addresses and numbers in the order of the kernel's parameters, its one float apart.
typedef struct {
    int64_t kernel, args[16];
    float real;
} call;

static int do_call(const call *c) {
    const int64_t *a = c->args;
#define AT(i) ((void *)a[i])
    switch ((enum kernel)c->kernel) {
        case LINEAR:
            perigee_linear(AT(0), AT(1), AT(2), AT(3), a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12]);
            return 0;
        case COPY_ENDS:
            perigee_copy_ends(AT(0), AT(1), a[2], a[3], a[4], a[5]);
            return 0;
        case ADD_RMS_NORM:
            perigee_add_rms_norm(AT(0), AT(1), AT(2), AT(3), AT(4), a[5], a[6], a[7], c->real);
            return 0;
        case GATED_SILU:
            perigee_gated_silu(AT(0), AT(1), a[2], a[3]);
            return 0;
        case ROTATE_AND_STORE:
            perigee_rotate_and_store(AT(0), AT(1), AT(2), AT(3), AT(4), AT(5), AT(6), a[7], a[8], a[9], a[10]);
            return 0;
        case ROTATE_AND_STORE_LATENT:
            perigee_rotate_and_store_latent(AT(0), AT(1), AT(2), AT(3), AT(4), AT(5), AT(6), AT(7), a[8], a[9], a[10], a[11],
                                            a[12], a[13], a[14], a[15], c->real);
            return 0;
        case ROUTE:
            return perigee_route(AT(0), AT(1), AT(2), AT(3), AT(4), a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13],
                                 c->real);
        case EXPERTS:
            return perigee_experts(AT(0), AT(1), AT(2), AT(3), AT(4), AT(5), a[6], a[7], a[8], a[9], a[10], a[11]);
        case ATTEND_PAGED:
            return perigee_attend_paged(AT(0), AT(1), AT(2), AT(3), AT(4), AT(5), a[6], a[7], a[8], a[9], a[10], a[11], a[12],
                                        a[13], a[14], a[15], c->real);
    }
#undef AT
    return -1;
}

// 0 if all were done, -1 if one of them had no memory.
int perigee_replay(const call *calls, long count) {
    for (long i = 0; i < count; i++)
        if (do_call(calls + i)) return -1;
    return 0;
}
