/* The FP64 finish of finish.hpp for C, Fortran and whatever else can call C; finish.cpp implements it.
 *
 * Arrays are in C order: a flux is (3, nx, ny, nz) [m³/s] through the low faces, solid (nx, ny, nz). In Fortran they
 * are flux(nz, ny, nx, 3) and solid(nz, ny, nx). Functions that return int return 0, or 1 where latentphys_error says
 * why; so does NULL where this does not say that it may be.
 */
#ifndef LATENTPHYS_FINISH_H
#define LATENTPHYS_FINISH_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct latentphys_finish latentphys_finish;

/* boundaries: six words with a blank between them, x- x+ y- y+ z- z+, each periodic | no_slip | free_slip | inflow |
 * outflow. spacing [m]. solid: not 0 where solid; NULL in an empty box. Returns NULL on an error. */
latentphys_finish* latentphys_finish_create(const int64_t shape[3], const double spacing[3], const char* boundaries,
                                            const uint8_t* solid);
void latentphys_finish_destroy(latentphys_finish* finish);

/* Stop the projection at this ‖net‖₂ / ‖flux‖₂ (1e-13 at first) or after so many iterations (1000); with warm_start not
 * 0 begin it with the potential of the call before. None of them changes that the net is 0.0. */
int latentphys_finish_set(latentphys_finish* finish, double tolerance, int max_iterations, int warm_start);

/* Replace a flux by the nearest one whose net is 0.0 in every cell. num_iterations may be NULL. On an error the flux is
 * as it was. */
int latentphys_finish_conserve(latentphys_finish* finish, double* flux, int* num_iterations);

/* Largest |net flux| of a cell [m³/s]; NaN where there is one, or no finish or flux. */
double latentphys_finish_net_flux_max(const latentphys_finish* finish, const double* flux);

/* What the last call that failed in this thread expected and got. */
const char* latentphys_error(void);

#ifdef __cplusplus
}
#endif

#endif
